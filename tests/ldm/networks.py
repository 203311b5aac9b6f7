"""Options of small networks in the authors' words, which the tests of several files build."""

from __future__ import annotations

from typing import Any

UNET: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 16}
CROSS_UNET = {**UNET, "use_spatial_transformer": True, "context_dim": 12}
FIRST_STAGE: dict[str, Any] = {"double_z": True, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3}
FIRST_STAGE |= {"ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
