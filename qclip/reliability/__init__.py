"""What quantization did to reliability: accuracy, calibration, detection, noise, shift, groups, with paired intervals."""
