"""modan-fast: pretrain medical-image encoders from modality and anatomy labels."""

__version__ = "0.1.0"
