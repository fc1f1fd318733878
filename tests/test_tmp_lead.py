import json
def test_a(one): 
    pass
def test_b(two): 
    from steer_heal.runs.events import read_events
    print([ (e['stage'],e['round'],e['wall_s']) for e in read_events(two)])
def test_c(two, capsys):
    import time
    from steer_heal.run import main
    t=time.time(); print(main(["--verify", str(two)]), time.time()-t)
    t=time.time(); print(main(["--resume", str(two)]), time.time()-t)
