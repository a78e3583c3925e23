from defib.cli import main

main()
