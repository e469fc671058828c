"""Precision, recall and nearest images: the definitions, what they are for, and exact distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.neighbours import NEIGHBOURS, nearest_images, precision_recall


def test_precision_and_recall_follow_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=generator), torch.randn(25, 3, generator=generator) + 0.7
    found = precision_recall(x, y)

    def covered(points: torch.Tensor, centres: torch.Tensor) -> int:
        count = 0
        for point in points:
            for j, centre in enumerate(centres):
                others = sorted(float((centre - c).norm()) for i, c in enumerate(centres) if i != j)
                if float((point - centre).norm()) <= others[NEIGHBOURS - 1]:
                    count += 1
                    break
        return count

    assert (found.precise, found.recalled) == (covered(x, y), covered(y, x))
    assert found.precision == found.precise / 30
    assert found.recall == found.recalled / 25
    assert found.precision_interval[0] < found.precision < found.precision_interval[1]


def test_a_model_that_knows_half_is_precise_and_recalls_half() -> None:
    generator = torch.Generator().manual_seed(0)
    clusters = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    real = clusters.repeat_interleave(100, dim=0) + torch.randn(200, 2, generator=generator)
    half = torch.randn(200, 2, generator=generator)
    found = precision_recall(half, real)
    assert found.precision > 0.9
    assert 0.4 < found.recall <= 0.5
    # The other way around: everything is there, and as much that is not real.
    found = precision_recall(real, half)
    assert found.recall > 0.9
    assert 0.4 < found.precision <= 0.5
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)


def test_too_few_images_are_refused() -> None:
    few, many = torch.zeros(NEIGHBOURS, 2), torch.zeros(9, 2)
    with pytest.raises(ValueError, match="samples: got 3"):
        precision_recall(few, many)
    with pytest.raises(ValueError, match="real images: got 3"):
        precision_recall(many, few)


def test_the_nearest_image_is_found_with_its_exact_distance() -> None:
    random = np.random.default_rng(0)
    others = random.integers(0, 256, (9000, 1, 6, 6), dtype=np.uint8)
    images = random.integers(0, 256, (1030, 1, 6, 6), dtype=np.uint8)
    copied = np.array([0, 8500, 8999])
    images[[0, 500, 1029]] = others[copied]
    images[1, 0, 0, 0] = 10
    others[4] = images[1]
    others[4, 0, 0, 0] = 16
    found = nearest_images(images, others)
    assert found.index[[0, 500, 1029]].tolist() == copied.tolist()
    assert (found.distance[[0, 500, 1029]] == 0).all()
    assert found.index[1] == 4
    assert found.distance[1] == pytest.approx(1.0)
    for i in (2, 700):
        squared = ((others.astype(float) - images[i]) ** 2).mean(axis=(1, 2, 3))
        assert found.index[i] == squared.argmin()
        assert found.distance[i] == pytest.approx(np.sqrt(squared.min()))
    with pytest.raises(ValueError, match="others: got shape"):
        nearest_images(images, others[:, :, :5])
