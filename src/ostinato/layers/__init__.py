"""The parts that models are made of; each works on the CPU and on the GPU, eagerly and in a captured step."""
