"""Published checkpoints in our format, one module per source. Command line: `python -m vfmvae.convert
--help`.
"""
