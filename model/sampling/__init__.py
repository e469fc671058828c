"""Samplers: generators that turn latents into images in bounded slices of work."""
