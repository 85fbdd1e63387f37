"""Published checkpoints in our format, one module per source; `python -m vfmvae.convert --help`."""
