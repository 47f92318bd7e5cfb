"""Reports: what a good engineer would tell you about a run, after looking at it for some steps.

One module per report turns numbers into findings: a pure function that never sees a tensor, a clock or a file, with its thresholds
as named constants and the reason for each. `collect` takes the numbers from live objects, without a trace. The report modules load no
torch, so that clients judge recorded history with them; `collect` does. May import `checkpoints`, `state` and `errors`; never
`control`, `store` or a door, and nothing here changes what it looks at.
"""
