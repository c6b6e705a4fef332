"""What `bench_microcontrollers.py` is made of."""
