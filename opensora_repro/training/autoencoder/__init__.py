"""Stage 0: training the autoencoder whose latents the later stages generate."""
