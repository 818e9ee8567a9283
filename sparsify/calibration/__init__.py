"""What is measured of a block while calibration rows pass it: inputs, moments, Hessians."""
