"""opensora-repro: an open, faithful and fast reproduction of the Open-Sora 1.0 text-to-video recipe."""

__version__ = "0.1.0"
