"""What NCA adds to TRL: losses over K scored responses, and the log-prob engine under them."""
