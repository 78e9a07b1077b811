"""The Gaussian base: layouts of sensors, emulator, Gaussians located at measurements, the emulator's density."""
