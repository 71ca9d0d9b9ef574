"""What a train step needs and how long it takes, found out before there is a machine to run it (`jaxembed.plan`)."""
