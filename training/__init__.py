"""Train and evaluate TarFlow models; needs only what a bare PyTorch image has."""
