"""Anomaly statistics: features of a flow, their combination, conformal calibration, maps."""
