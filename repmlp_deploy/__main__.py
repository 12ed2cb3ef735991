"""`python -m repmlp_deploy COMMAND`: all commands under one name."""

from repmlp_deploy.cli.entry import main

if __name__ == "__main__":
    main()
