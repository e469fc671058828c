-- model, name: forget a run; whether there was one.
return forget_run(ARGV[1], ARGV[2])
