-- replica
go_on_when_full()
detach(arg(1))
return 1
