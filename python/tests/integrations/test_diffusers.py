"""A pipeline of diffusers on flashtile, by way of F.scaled_dot_product_attention."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import flashtile

ROUNDS = 2


def small_pipeline() -> Any:
    """Random weights; a convolutional network with attention on the way down and up."""
    network: Any = diffusers.UNet2DModel
    unet = network(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler: Any = diffusers.DDIMScheduler
    pipeline: Any = diffusers.DDIMPipeline
    return pipeline(unet, scheduler())


@pytest.mark.usefixtures("one_thread")
def test_pipeline() -> None:
    """The same images, every attention of it on flashtile."""
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Any:
        generator = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": ROUNDS, "output_type": "np", "batch_size": 2}
        return pipeline(generator=generator, **how).images

    with flashtile.use_as_sdpa(strict=True) as handle:
        actual = images()
    layers = sum(hasattr(module, "to_q") for module in pipeline.unet.modules())
    assert layers >= 3
    assert handle.counts == (ROUNDS * layers, 0, {})
    np.testing.assert_allclose(actual, images(), atol=1e-5)
    assert handle.counts == (ROUNDS * layers, 0, {})
