"""From results to answers: what a job's answer is made of, whichever process makes it, and when."""
