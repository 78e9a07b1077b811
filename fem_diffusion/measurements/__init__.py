"""Readings as people have them: from a file of numbers to measurements that a model takes."""
