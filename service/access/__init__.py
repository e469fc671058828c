"""Who may call, and how much: keys, scopes and rates. No HTTP."""
