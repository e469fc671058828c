-- model, name: forget a calibration; whether there was one.
call('SREM', names_key(ARGV[1]), ARGV[2])
return call('DEL', calibration_key(ARGV[1], ARGV[2]))
