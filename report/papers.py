"""The thirteen papers as the front table shows them."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    key: str  # the folder in the repository and the name of its results file
    title: str
    venue: str
    arxiv: str
    idea: str


PAPERS = (
    Paper(
        "pixart",
        "PixArt-α: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
        "ICLR 2024",
        "2310.00426",
        "Split training into three stages and write dense captions; a text-to-image transformer then costs a tenth.",
    ),
    Paper(
        "instaflow",
        "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        "ICLR 2024",
        "2309.06380",
        "Straighten the flow of a teacher first, distil it second: one step then suffices.",
    ),
    Paper(
        "ldm",
        "High-Resolution Image Synthesis with Latent Diffusion Models",
        "CVPR 2022",
        "2112.10752",
        "Diffuse in the latent space of an autoencoder instead of in pixels.",
    ),
    Paper(
        "hipa",
        "HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation",
        "arXiv 2023",
        "2311.18158",
        "What one-step samples lack is high frequencies; a small low-rank adaptor brings them back.",
    ),
    Paper(
        "slam",
        "Accelerating Image Generation with Sub-path Linear Approximation Model",
        "ECCV 2024",
        "2404.13903",
        "Distil along every point of each teacher sub-step, not only at its two ends.",
    ),
    Paper(
        "lightgen",
        "LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization",
        "arXiv 2025",
        "2503.08619",
        "Learn from a teacher's pictures with a small masked autoregressive model, then polish with preferences.",
    ),
    Paper(
        "instella_t2i",
        "Instella-T2I: Pushing the Limits of 1D Discrete Latent Space Image Generation",
        "arXiv 2025",
        "2506.21022",
        "Write an image as a short one-dimensional string of binary tokens.",
    ),
    Paper(
        "scenesplat",
        "SceneSplat: Gaussian Splatting-based Scene Understanding with Vision-Language Pretraining",
        "ICCV 2025",
        "2503.18052",
        "Read open-vocabulary meaning straight from Gaussian splats in one forward pass.",
    ),
    Paper(
        "eeea_net",
        "EEEA-Net: An Early Exit Evolutionary Neural Architecture Search",
        "Eng. Appl. of AI 2021",
        "2108.06156",
        "Stop training a candidate network as soon as it is too large to be worth it.",
    ),
    Paper(
        "pc_darts",
        "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search",
        "ICLR 2020",
        "1907.05737",
        "Search with a quarter of the channels: less memory, larger batches, steadier choices.",
    ),
    Paper(
        "eagan",
        "EAGAN: Efficient Two-stage Evolutionary Architecture Search for GANs",
        "ECCV 2022",
        "2111.15097",
        "Evolve the generator first and the discriminator second, sharing weights throughout.",
    ),
    Paper(
        "electra",
        "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
        "ICLR 2020",
        "2003.10555",
        "Ask of every token whether it was replaced, and learn from all of them instead of a masked few.",
    ),
    Paper(
        "se_moe",
        "SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System",
        "arXiv 2022",
        "2205.10034",
        "Keep experts where memory is cheap and hide the traffic behind the arithmetic.",
    ),
)
