-- model, cost, caller, most waiting cost, most of one caller, most that this caller has open
return refused(arg(1), tonumber(arg(2)), arg(3), tonumber(arg(4)), tonumber(arg(5)), tonumber(arg(6))) or {'ok'}
