"""What quantization did to reliability: accuracy, calibration, detection, noise, shift and groups, paired."""
