"""Calibration: what some methods want to know of a model beforehand."""
