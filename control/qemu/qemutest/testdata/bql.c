// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Preloaded into a QEMU that is primary under TCG, 7.2 to 11.
//
// Its colo_do_checkpoint_transaction() calls qemu_savevm_live_state() without
// the big lock. There TCG's log_global_after_sync has a vCPU do some work and waits
// for it, which under KVM is not so (do_run_on_cpu). Two things go wrong:
//
// The wait, qemu_cond_wait(&qemu_work_cond, &big lock), is on a mutex that the thread
// does not own. It unlocks another's mutex, returns owning it, and deadlocks with
// itself when it starts the guest again. So here a wait on a mutex that the caller does
// not own takes it around a short wait. Callers look at their condition again.
//
// The vCPU is woken without the lock under which it looks for work before it sleeps,
// so it may sleep through that, and the primary waits for ever. So all that sleep on
// this mutex are woken once more; they, too, look at their condition again.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int (*real_wait)(pthread_cond_t *, pthread_mutex_t *);
static int (*real_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static __thread int tid;

// Who sleeps. An entry is written by a thread that holds its mutex, and read for a
// mutex that is held.
static struct sleeper {
	pthread_mutex_t *mutex;
	pthread_cond_t *cond;
} sleepers[256];

static struct sleeper *sleeps(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
	for (int i = 0; i < 256; i++) {
		struct sleeper *s = &sleepers[i];

		if (!__sync_bool_compare_and_swap(&s->mutex, NULL, mutex))
			continue;
		s->cond = cond;
		return s;
	}
	return NULL;
}

static void wake(pthread_mutex_t *mutex)
{
	for (int i = 0; i < 256; i++)
		if (sleepers[i].mutex == mutex)
			pthread_cond_broadcast(sleepers[i].cond);
}

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
	if (mutex->__data.__owner == tid) {
		struct sleeper *s = sleeps(cond, mutex);
		int err = real_wait(cond, mutex);

		if (s)
			s->mutex = NULL;
		return err;
	}
	pthread_mutex_lock(mutex);
	wake(mutex);
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
