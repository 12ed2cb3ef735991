"""Run OpenVINO IR on the CPU."""
