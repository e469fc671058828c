"""Extractors and statistics from files: TorchScript as it circulates, moments as they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.feature_files import open_extractor, read_statistics
from training.features import ExtractorError
from training.frechet import Moments, frechet_distance


class Means(nn.Module):
    """Features of a colour image: the means of its channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


class Classifier(nn.Module):
    """Logits, and on demand features, as in the Inception that circulates for FID."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = images.float().mean(dim=(2, 3))
        if return_features:
            return features
        return features.sum(dim=1, keepdim=True)


class Maps(nn.Module):
    """No features: maps."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def script(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("module", [Means(), Classifier()])
def test_a_torchscript_file_gives_features_under_its_own_name(module: nn.Module, tmp_path: Path) -> None:
    path = script(module, tmp_path / "net.pt")
    extractor = open_extractor(str(path))
    assert extractor.num_features == 3
    assert extractor.name.startswith("net@")
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    torch.testing.assert_close(extractor(pixels), pixels.float().mean(dim=(2, 3)))
    grey = pixels[:, :1]
    torch.testing.assert_close(extractor(grey), grey.float().mean(dim=(2, 3)).expand(-1, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_is_no_extractor_is_refused(tmp_path: Path) -> None:
    maps = script(Maps(), tmp_path / "maps.pt")
    with pytest.raises(ExtractorError, match=r"gives \(2, 3, 32, 32\), allowed is features of shape"):
        open_extractor(str(maps))
    text = tmp_path / "text.pt"
    text.write_text("not a module")
    with pytest.raises(ExtractorError, match=r"text.pt, allowed is a TorchScript file"):
        open_extractor(str(text))
    with pytest.raises(ExtractorError, match="got 'inception', allowed is efficientnet-lite0"):
        open_extractor("inception")


def test_published_statistics_give_the_distance_from_their_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(500, 4, generator=generator), 2 * torch.randn(300, 4, generator=generator) + 1
    path = tmp_path / "reference.npz"
    np.savez(path, mu=real.double().mean(dim=0).numpy(), sigma=np.cov(real.double().numpy(), rowvar=False))
    expected = frechet_distance(Moments.of(fake), Moments.of(real))
    assert frechet_distance(Moments.of(fake), read_statistics(path)) == pytest.approx(expected)


def test_statistics_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(
        ValueError, match=r"reference\.npz, which cannot be read \(No such file or directory\), allowed is"
    ):
        read_statistics(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"statistics: .* has no sigma, allowed is both mu and sigma"):
        read_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mu of shape \(3,\) and sigma of shape \(2, 2\)"):
        read_statistics(path)
    np.savez(path, mu=np.zeros(2), sigma=np.array([[1, np.nan], [np.nan, 1]]))
    with pytest.raises(ValueError, match=r"statistics: .* has values that are not finite"):
        read_statistics(path)
    path.write_bytes(b"PK not a zip file")
    with pytest.raises(ValueError, match=r"allowed is an \.npz file"):
        read_statistics(path)
