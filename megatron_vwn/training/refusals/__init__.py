"""What cannot run, decided before anything is built; every refusal is one sentence."""
