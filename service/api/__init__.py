"""HTTP: parse, call, render. No logic of the flow, and no torch."""
