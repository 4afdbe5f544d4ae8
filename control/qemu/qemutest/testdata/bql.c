// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Preloaded into a QEMU 7.2 that is primary under TCG.
//
// Its colo_do_checkpoint_transaction() calls qemu_savevm_live_state() without
// the big lock. TCG's log_global_after_sync waits there for a vCPU by
// qemu_cond_wait(&qemu_work_cond, &big lock): a wait on a mutex that the thread
// does not own. It unlocks another's mutex, returns owning it, and deadlocks with
// itself when it starts the guest again.
//
// So here a wait on a mutex that the caller does not own takes it around a
// short wait. Callers look at their condition again.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int (*real_wait)(pthread_cond_t *, pthread_mutex_t *);
static int (*real_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static __thread int tid;

__attribute__((constructor)) static void find(void)
{
	// The versions matter: glibc has older functions of the same name.
	real_wait = dlvsym(RTLD_NEXT, "pthread_cond_wait", "GLIBC_2.3.2");
	real_timedwait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
}

int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
	struct timespec t;

	if (!real_wait)
		find();
	if (!tid)
		tid = syscall(SYS_gettid);
	if (mutex->__data.__owner == tid)
		return real_wait(cond, mutex);
	pthread_mutex_lock(mutex);
	clock_gettime(CLOCK_REALTIME, &t);
	t.tv_nsec += 1000000;
	if (t.tv_nsec >= 1000000000) {
		t.tv_sec++;
		t.tv_nsec -= 1000000000;
	}
	real_timedwait(cond, mutex, &t);
	pthread_mutex_unlock(mutex);
	return 0;
}
