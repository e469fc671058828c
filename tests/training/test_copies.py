"""Whether samples are copies of training images: these are found out, mirrored ones too, and honest samples are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from training.data import Images
from training.quality import find_copies

CPU = torch.device("cpu")


def test_copies_of_training_images_are_found_out(make_images: Callable[..., Images]) -> None:
    train, held_out, fresh = (make_images(200, seed=seed).pixels for seed in (1, 2, 3))
    honest = find_copies(fresh, held_out, train, CPU)
    assert honest.share_nearer < 0.1
    # A model that has learned its training images by heart, but for one step of one pixel.
    copied = train.copy()
    copied[:, 0, 0, 0] += 1
    found = find_copies(copied[50:], held_out, train, CPU)
    assert found.share_nearer == 1
    assert found.samples.index.tolist() == list(range(50, 200))
    np.testing.assert_allclose(found.samples.distance, 1 / 8)
    differences = found.pairs[0].astype(int) - found.pairs[1]
    assert (np.abs(differences).sum(axis=(1, 2, 3)) == 1).all()


def test_exact_copies_are_found_out_where_test_images_are_copies_too(make_images: Callable[..., Images]) -> None:
    train, fresh = (make_images(200, seed=seed).pixels for seed in (1, 2))
    # Two of a hundred test images are in the training split as well: the nearest 1% have distance 0.
    held_out = np.concatenate([train[:2], fresh[:98]])
    found = find_copies(train, held_out, train, CPU)
    assert np.quantile(found.held_out.distance, 0.01) == 0
    assert found.share_nearer == 1


def test_mirrored_copies_are_found_out_where_the_model_was_trained_on_mirror_images(
    make_images: Callable[..., Images],
) -> None:
    train, held_out, fresh = (make_images(200, seed=seed).pixels for seed in (1, 2, 3))
    assert find_copies(fresh, held_out, train, CPU, mirrored=True).share_nearer < 0.1
    copied = train.copy()
    copied[::2] = train[::2, ..., ::-1]
    found = find_copies(copied, held_out, train, CPU, mirrored=True)
    assert found.mirrored
    assert found.samples.index.tolist() == list(range(200))
    assert found.samples.distance.max() == 0
    # Shown as the sample is.
    np.testing.assert_array_equal(found.pairs[0], found.pairs[1])
    # Held-out images are looked for in the same way: mirrored ones are as near.
    mirror = find_copies(fresh, held_out[..., ::-1], train, CPU, mirrored=True)
    straight = find_copies(fresh, held_out, train, CPU, mirrored=True)
    np.testing.assert_array_equal(mirror.held_out.distance, straight.held_out.distance)
    without = find_copies(copied, held_out, train, CPU)
    assert not without.mirrored
    assert (without.samples.distance == 0).sum() == 100
