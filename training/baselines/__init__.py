"""Flows to compare a TarFlow with, trained by the same loop."""
