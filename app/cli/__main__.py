from app.cli.application import main

main()
