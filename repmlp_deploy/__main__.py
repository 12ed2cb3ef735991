"""`python -m repmlp_deploy COMMAND`: all commands under one name."""

from repmlp_deploy.cli.shared.entry import main

if __name__ == "__main__":
    main()
