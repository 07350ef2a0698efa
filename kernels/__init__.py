"""Fused attention and pose encodings in Triton, each beside a plain torch reference. See README.md."""
