"""The schedules: one file per method. `llmselect.dynamic.ClassName` finds any of them, third parties' too."""
