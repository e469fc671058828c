-- model, name, version, data: keep a calibration.
keep(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return 1
