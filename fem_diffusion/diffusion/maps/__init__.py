"""Monotone maps of single latents and readings, known laws behind them, and noise carried through."""
