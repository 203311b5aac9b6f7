"""ELECTRA: pre-training text encoders as discriminators rather than generators (Clark et al., ICLR 2020)."""
