"""Codecs: what turns images into what a flow models, and back."""
