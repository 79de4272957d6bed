/*
 * Touching memory that may refuse: SIGBUS and SIGSEGV become a result.
 *
 * For tests (protocol_tools.py).  A handler that leaves by siglongjmp stands while at least one thread is inside a call
 * of this library; before and after that the process has whatever handlers it had, such as faulthandler's.  A signal
 * that hits a thread which is not inside a call goes to these too.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

struct touched {
	int32_t signal; /* 0: the touch went well */
	int32_t code;   /* si_code */
	uint64_t address; /* si_addr */
	uint8_t byte;   /* what was read */
};

/* What many touches came to. */
struct tally {
	uint64_t touches;
	uint64_t right; /* the byte that was expected */
	uint64_t zeros;
	uint64_t others;
	uint64_t sigbus;
	uint64_t poisoned; /* of these, with the code of a poisoned page: a range was just changing hands */
	uint64_t sigsegv;
	uint64_t latest; /* where the latest byte that was neither right nor refused stood */
};

/* Static TLS: a handler must not allocate, as the first access of a thread would otherwise. */
#define MINE static __thread __attribute__((tls_model("initial-exec")))
MINE sigjmp_buf *volatile landing;
MINE volatile struct touched caught;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int inside;
static struct sigaction before_sigbus, before_sigsegv;

static void land(int number, siginfo_t *info, void *context)
{
	struct sigaction *before = number == SIGBUS ? &before_sigbus : &before_sigsegv;

	if (landing) {
		caught.signal = number;
		caught.code = info->si_code;
		caught.address = (uint64_t)(uintptr_t)info->si_addr;
		siglongjmp(*landing, 1);
	}
	if (before->sa_flags & SA_SIGINFO)
		before->sa_sigaction(number, info, context);
	else if (before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN)
		sigaction(number, before, NULL); /* the touch is repeated, and ends as it would have */
	else
		before->sa_handler(number);
}

static void enter(void)
{
	struct sigaction action = {.sa_sigaction = land, .sa_flags = SA_SIGINFO | SA_NODEFER};

	pthread_mutex_lock(&lock);
	if (inside++ == 0) {
		sigaction(SIGBUS, &action, &before_sigbus);
		sigaction(SIGSEGV, &action, &before_sigsegv);
	}
	pthread_mutex_unlock(&lock);
}

static void leave(void)
{
	pthread_mutex_lock(&lock);
	if (--inside == 0) {
		sigaction(SIGBUS, &before_sigbus, NULL);
		sigaction(SIGSEGV, &before_sigsegv, NULL);
	}
	pthread_mutex_unlock(&lock);
}

/* One touch: the byte at an address is read, or written if `byte` is not negative. */
static struct touched touch(uint64_t address, int byte)
{
	volatile uint8_t *where = (volatile uint8_t *)(uintptr_t)address;
	struct touched result = {0};
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		landing = NULL;
		result.signal = caught.signal;
		result.code = caught.code;
		result.address = caught.address;
		return result;
	}
	landing = &here;
	if (byte < 0)
		result.byte = *where;
	else
		*where = (uint8_t)byte;
	landing = NULL;
	return result;
}

int try_read(uint64_t address, struct touched *result)
{
	enter();
	*result = touch(address, -1);
	leave();
	return result->signal;
}

int try_write(uint64_t address, uint8_t byte, struct touched *result)
{
	enter();
	*result = touch(address, byte);
	leave();
	return result->signal;
}

static void count(struct tally *tally, struct touched touched, uint8_t right, uint64_t address)
{
	tally->touches++;
	if (touched.signal == SIGBUS) {
		tally->sigbus++;
		tally->poisoned += touched.code == BUS_MCEERR_AR;
	} else if (touched.signal)
		tally->sigsegv++;
	else if (touched.byte == right)
		tally->right++;
	else {
		tally->latest = address;
		if (touched.byte)
			tally->others++;
		else
			tally->zeros++;
	}
}

/*
 * Touch pages in turn until `stop` is set: from page `first` on every `step`th, around and around.  With `write`, a byte
 * is written before another one of the page is read, so that a page which the write made would be seen by its zeros.
 */
void touch_often(uint64_t start, uint64_t pages, uint64_t page_size, uint64_t first, uint64_t step, int write,
		 uint8_t right, const volatile int32_t *stop, struct tally *tally)
{
	enter();
	for (uint64_t page = first; !*stop; page = (page + step) % pages) {
		uint64_t address = start + page * page_size;
		struct touched touched = {0};

		if (write)
			touched = touch(address + page_size - 1, right);
		if (!touched.signal)
			touched = touch(address, -1);
		count(tally, touched, right, address);
	}
	leave();
}
