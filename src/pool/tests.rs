//! Both kinds of team: order, panics, nested and simultaneous calls; and what the environment variable may say.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;

use super::{in_team, map, own, parse, seated, set_threads, threads_for};

const MUCH: usize = usize::MAX;

#[test]
fn the_environment_variable_is_a_positive_whole_number() {
    assert_eq!(parse("").unwrap(), usize::MAX);
    assert_eq!(parse("3").unwrap(), 3);
    for bad in ["0", "-1", "two", "1.5", " 2", "2 "] {
        let error = parse(bad).unwrap_err().to_string();
        assert_eq!(error, format!("KVPACK_NUM_THREADS={bad} is not accepted; accepted: a positive whole number"));
    }
}

/// One after the other, as the number of threads is the process's.
#[test]
fn teams() {
    let _alone = crate::tests::threads(3);
    items_stay_in_order_and_none_is_lost();
    little_work_is_the_callers();
    a_panic_reaches_the_caller_and_the_next_call_works();
    calls_nest();
    callers_do_not_wait_for_each_other();
    several_threads_take_part();
    #[cfg(unix)]
    forks_work();
    #[cfg(unix)]
    if super::openmp::tests::load() {
        assert!(super::use_openmp());
        assert!(super::openmp_library().unwrap().contains("gomp"));
        several_threads_take_part();
        items_stay_in_order_and_none_is_lost();
        little_work_is_the_callers();
        a_panic_reaches_the_caller_and_the_next_call_works();
        calls_nest();
        callers_do_not_wait_for_each_other();
    }
    set_threads(1);
    assert_eq!(threads_for(MUCH), 1);
}

/// A process that is forked while it has a pool: the child's calls work, with threads of its own or alone.
#[cfg(unix)]
#[allow(unsafe_code)]
fn forks_work() {
    several_threads_take_part();
    // SAFETY: the child only computes, and leaves without running anybody's handlers.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let right = map(MUCH, (0..100).collect(), |i: usize| 2 * i) == (0..100).map(|i| 2 * i).collect::<Vec<_>>();
        // SAFETY: it ends the child, and nothing else.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = -1;
    // SAFETY: it waits for that child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
}

fn items_stay_in_order_and_none_is_lost() {
    for n in [0, 1, 2, 3, 100] {
        let doubled: Vec<usize> = map(MUCH, (0..n).collect(), |i| 2 * i);
        assert_eq!(doubled, (0..n).map(|i| 2 * i).collect::<Vec<_>>());
    }
}

fn little_work_is_the_callers() {
    let caller = thread::current().id();
    let ids = map(1, vec![(); 50], |()| thread::current().id());
    assert!(ids.iter().all(|&id| id == caller));
}

fn several_threads_take_part() {
    let all_there = Barrier::new(3);
    in_team(3, 3, || {
        all_there.wait();
    });
}

fn a_panic_reaches_the_caller_and_the_next_call_works() {
    for bad in [0, 57, 99] {
        let all = AssertUnwindSafe(|| map(MUCH, (0..100).collect(), |i| assert_ne!(i, bad, "item {i}")));
        let panic = catch_unwind(all).unwrap_err();
        assert!(panic.downcast_ref::<String>().unwrap().contains(&format!("item {bad}")));
        items_stay_in_order_and_none_is_lost();
    }
}

fn calls_nest() {
    let sums = map(MUCH, (0..20).collect(), |i: usize| {
        let here = thread::current().id();
        let inner = |j: usize| {
            assert_eq!(thread::current().id(), here);
            i * j
        };
        map(MUCH, (0..20).collect(), inner).iter().sum::<usize>()
    });
    assert_eq!(sums, (0..20).map(|i| i * 190).collect::<Vec<_>>());
}

fn callers_do_not_wait_for_each_other() {
    let both_inside = Barrier::new(2);
    let call = || {
        map(MUCH, (0..20).collect(), |i: usize| {
            if i == 0 {
                both_inside.wait();
            }
            i
        })
    };
    thread::scope(|scope| {
        scope.spawn(call);
        call();
    });
}

/// The others of a team may be there before its caller, and more of them than wanted.
#[test]
fn the_caller_has_a_seat() {
    for (threads, others) in [(2, 1), (2, 5), (3, 2), (3, 3), (4, 9)] {
        let at_work = Mutex::new(Vec::new());
        let work = || at_work.lock().unwrap().push(thread::current().id());
        seated(threads, threads, work, |member| {
            for _ in 0..others {
                thread::scope(|scope| scope.spawn(member).join()).unwrap();
            }
            member();
        });
        let at_work = at_work.into_inner().unwrap();
        assert_eq!(at_work.len(), threads.min(others + 1));
        assert_eq!(*at_work.last().unwrap(), thread::current().id());
    }
}

#[test]
fn no_more_members_than_wanted() {
    let at_work = AtomicUsize::new(0);
    own::run(4, &|| {
        at_work.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(at_work.swap(0, Ordering::Relaxed), 4);
    in_team(2, 2, || {
        at_work.fetch_add(1, Ordering::Relaxed);
    });
    assert!(at_work.into_inner() <= 2);
}
