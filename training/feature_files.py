"""Feature extractors and reference statistics from files that the user gives: the standard FID, for one.

An extractor is a TorchScript module that maps 8-bit images (B, 3, H, W) to features (B, F); one whose ``forward`` has
an argument ``return_features``, as the Inception-v3 in circulation for FID, is called with it set. Images are not
scaled here: such modules do that themselves, since how it is done is a part of the figure. A reference is an ``.npz``
file with the mean ``mu`` (F,) and the covariance ``sigma`` (F, F) of real images' features, as published for benchmark
sets.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.features import EXTRACTORS, Extractor, ExtractorError, load_extractor
from training.frechet import Moments


def open_extractor(name_or_path: str, device: torch.device | str = "cpu") -> Extractor:
    """An extractor by name, or a TorchScript file; raises :class:`~training.features.ExtractorError`."""
    path = Path(name_or_path)
    if path.is_file():
        return _script(path, device)
    if name_or_path not in EXTRACTORS:
        allowed = f"{', '.join(EXTRACTORS)} or a TorchScript file"
        raise ExtractorError(f"extractor: got {name_or_path!r}, allowed is {allowed}")
    return load_extractor(name_or_path, device)


def _script(path: Path, device: torch.device | str) -> Extractor:
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ExtractorError(f"extractor: got {path}, allowed is a TorchScript file: {_first_line(error)}") from error
    options = {argument.name for argument in net.forward.schema.arguments}
    keywords = {"return_features": True} if "return_features" in options else {}

    def extract(pixels_BCHW: Tensor) -> Tensor:
        features = net(pixels_BCHW.expand(-1, 3, -1, -1), **keywords)
        if not isinstance(features, Tensor) or features.dim() != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ExtractorError(f"extractor: {path} gives {shape}, allowed is features of shape (images, features)")
        return features.float()

    try:
        with torch.no_grad():
            probe = extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))
    except RuntimeError as error:
        raise ExtractorError(f"extractor: {path} cannot be used on 8-bit images: {_first_line(error)}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return Extractor(name=f"{path.stem}@{digest}", num_features=probe.shape[1], extract=extract)


def _first_line(error: Exception) -> str:
    # PyTorch's own text goes on with a trace through the script.
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_statistics(path: Path) -> Moments:
    """The moments in a reference file; raises ``ValueError`` that says what is wrong with it."""
    try:
        file = np.load(path, allow_pickle=False)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"statistics: got {path}, which cannot be read ({why}), allowed is an .npz file") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"statistics: got {path}, allowed is an .npz file") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"statistics: got {path}, a single array, allowed is an .npz file")
    with file:
        missing = [name for name in ("mu", "sigma") if name not in file]
        if missing:
            raise ValueError(f"statistics: {path} has no {' and no '.join(missing)}, allowed is both mu and sigma")
        mean, covariance = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"statistics: {path} has mu of shape {tuple(mean.shape)} and sigma of shape {tuple(covariance.shape)}, "
            "allowed is (F,) and (F, F)"
        )
    if not bool(mean.isfinite().all() & covariance.isfinite().all()):
        raise ValueError(f"statistics: {path} has values that are not finite, allowed is finite mu and sigma")
    # The file does not say of how many images; a scatter of two has the covariance as it is.
    return Moments(2, mean, covariance)


def write_statistics(path: Path, moments: Moments) -> None:
    """Write moments as :func:`read_statistics` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, mu=moments.mean_F.numpy(), sigma=moments.covariance.numpy())
