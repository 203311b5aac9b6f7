"""SE-MoE: training and serving mixtures of experts that are larger than the device (arXiv 2205.10034)."""
