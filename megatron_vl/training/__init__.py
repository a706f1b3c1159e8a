"""The trainer: one family-agnostic program over Megatron-Core's pipeline schedules."""
