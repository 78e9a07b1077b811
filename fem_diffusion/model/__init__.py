"""Fit, condition, sample: from an inverse problem and its joint samples to Functions."""
