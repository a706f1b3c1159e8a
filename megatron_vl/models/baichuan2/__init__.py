"""Baichuan2-7B, Base and Chat: a Llama decoder with W_pack and NormHead."""
